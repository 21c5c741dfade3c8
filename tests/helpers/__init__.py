"""What several tests share: made-up models, shards, documents, and the words of a fake world."""
