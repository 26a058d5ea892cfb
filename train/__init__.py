"""The transducer: rnnt/ (the loss), model, trainer, checkpoint, decode, score."""
