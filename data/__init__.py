"""The corpus: manifests in; validation, ASR units, acoustic features, batching; the demo corpus."""
