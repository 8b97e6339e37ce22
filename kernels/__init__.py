"""Triton kernels and their launchers, one file for each primitive; installed as `fused_res.kernels`."""
