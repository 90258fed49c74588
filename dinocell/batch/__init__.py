"""Segment many files: options, one resumable run, and parts of a batch for many processes."""
