"""What a block's step costs on a GPU, as far as it can be counted: its kernels, their bytes and instructions, and their times."""
