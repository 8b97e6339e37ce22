"""Tuning by measurement: trials of convolutions and of levels, and what is kept of them."""
