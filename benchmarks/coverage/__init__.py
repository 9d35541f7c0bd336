"""Coverage: which of transformers' causal-LM types are exact, and which are refused and why."""
