"""What platforms do in place of the plain formula."""
