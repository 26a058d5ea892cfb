"""What a tokenizer makes of transcripts: the characters of each token, and whether the tokens stand for the text."""
