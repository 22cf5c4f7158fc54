"""References, manifests, signatures: text and bytes parsed, without disk, network or database."""
