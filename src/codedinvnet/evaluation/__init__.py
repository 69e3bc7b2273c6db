"""What a bundle is worth: accuracy under erasures, exactness of its inverse, costs."""
