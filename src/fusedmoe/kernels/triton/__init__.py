"""The @triton.jit bodies and their launches; importing a module here needs Triton."""
