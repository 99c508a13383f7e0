"""What a finetuned network makes of chips and scenes, and a backbone's features of chips, as files."""
