"""Training stages: the network, the fusion data set, the fusion encoder."""
