"""From text files to the rows of a run: documents, tokenizer, token stores, mixture, packing, loader."""
