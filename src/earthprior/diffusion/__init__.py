"""The mathematics of diffusion: schedule, objective, linear denoiser, sampling, gain."""
