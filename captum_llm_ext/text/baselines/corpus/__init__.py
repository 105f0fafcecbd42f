"""`CorpusBaselines`: absent features replaced by what a corpus has in the same surroundings."""
