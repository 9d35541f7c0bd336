"""ppcompile: any causal LM, trained on preference-packed batches."""
