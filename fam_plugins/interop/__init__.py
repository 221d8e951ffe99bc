"""One file a partner: evaluation harnesses, few-shot libraries."""
