"""The equivariant network: basis, products, backbone, heads, committee, file format."""
