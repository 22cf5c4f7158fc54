"""Files of a merge: tensors read and rounded, shards written, a journal of what is done."""
