"""The model that is trained: policy, adapter, embedded model, loading."""
