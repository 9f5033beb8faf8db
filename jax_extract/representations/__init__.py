"""What a model makes of every token of its vocabulary: one array a layer and hook point."""
