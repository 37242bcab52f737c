"""From labelled structures to a trained committee."""
