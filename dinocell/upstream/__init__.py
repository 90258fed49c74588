"""Our additions on a checkout of Meta's DINOv3: apply, undo, rebase, verify.

`patches/` holds the series: small additions with zero context, each line of them marked, and the
list of our files that go with them.  `dinocell upstream` maintains a tree with both.
"""
