"""Rows of training data: read from files, understood, and encoded for one tokenizer. Nothing here loads a model."""
