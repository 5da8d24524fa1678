"""Text corpora, tokenizers and the data loader; import the module you need, as `files` must stay cheap."""
