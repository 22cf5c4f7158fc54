"""Bases in fp8 and nf4: dequantized, and how far the quantized model is from the dequantized one."""
