"""The pages of docs/reference that are made of the code: each module has `page()`, which returns one of them."""
