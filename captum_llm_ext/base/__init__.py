"""What every part stands on and that knows none of them: files, digests, messages, the terminal."""
