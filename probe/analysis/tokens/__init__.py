"""What tokens say about routing: vocabulary, words of an expert, and routing as information."""
