"""The pages of docs/reference that are made from the code: each module has `page()`, which returns one of them."""
