"""Trained bundles, a folder each, for `codedinvnet.load_bundle`."""
