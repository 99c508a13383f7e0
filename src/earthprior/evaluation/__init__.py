"""What the evaluate stage is made of: denoising at fixed noise levels, samples, and the probe on labelled chips."""
