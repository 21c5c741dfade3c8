"""Vectors for search: sentence-transformers' trainer, with our data, settings, evaluation and folder.

config.py      the settings file                     retrieval.py   texts, questions and answers, as BEIR lays them out
lexical.py     tf-idf, to compare with and to mine   ranking.py     nDCG, recall and MRR of any scores
negatives.py   hard negatives                        models.py      a folder as a model of sentence-transformers
train.py       the story                             folder.py      what is written
"""
