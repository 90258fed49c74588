"""Work on a SLURM cluster: submitting, surviving, watching, and many tasks over one set of images."""
