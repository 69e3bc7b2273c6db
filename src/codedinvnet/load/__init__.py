"""`codedinvnet load`: sends requests to any server of the Open Inference Protocol V2."""
