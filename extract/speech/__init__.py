"""Speech encoders over audio: their states by frame. Imports `data`, `extract.teacher`, torch and transformers."""
