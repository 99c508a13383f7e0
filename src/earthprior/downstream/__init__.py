"""What a pretrained backbone is for: maps and answers from few labels."""
