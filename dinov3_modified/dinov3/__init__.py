"""DINOCell's `dinov3`: our own implementation of DINOv3, with the interface of Meta's.

Module paths, public names, signatures and state-dict keys are those of facebookresearch/dinov3
@ 6876159; the code is written from the paper (Siméoni et al. 2025, arXiv 2508.10104) and from facts
of that interface.  `../README.md` lists what is mirrored and what is our addition.
"""

# dinocell recognises the bundled tree by this; another compatible tree need not have it.
DINOCELL_TREE = True
