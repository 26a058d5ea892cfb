"""One module a kind of corpus: each reads what people have into utterances and findings."""
