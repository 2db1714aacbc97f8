"""What training and decoding cost, against peft and TRL in the same run: `python -m benchmarks --help`."""
