"""pgolf.kernels: hand-written Triton kernels, each with a PyTorch reference of the same signature."""

if __name__ == "kernels":  # found from the root of a checkout; a second copy would register every operator twice
    raise ImportError("import pgolf.kernels, to which this folder belongs; the package `kernels` is another project's")
