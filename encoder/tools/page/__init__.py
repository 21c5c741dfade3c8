"""A page to try models on: folders that transformers or sentence-transformers read, each a tab of its own.

    folders.py       what a folder is, and its model
    encoding.py      texts to what a model takes, cut at its longest text
    fill_mask.py     words for [MASK]                  classify.py     labels of a text or of two
    tags.py          labels of words                   span.py         an answer in a text
    choice.py        one of several answers            similarity.py   how alike texts are
    blocks.py        the page; alone in importing gradio

What a tab does is a plain function: texts in, a box of values out. The page only shows it.
"""
