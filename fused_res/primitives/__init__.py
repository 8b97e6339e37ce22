"""The steps a schedule is made of: each file holds a primitive's contract, its checks and its plain formula.

Activations are matrices [P, C] of P = N*H*W rows (NHWC order, contiguous); per-channel vectors are float32, or float64 where
the activations are. A primitive takes the `Run` that carries it out and finds the kernels.
"""
