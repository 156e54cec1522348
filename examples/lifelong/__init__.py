"""A language model learns three corpora in turn: how much of the earlier ones does it forget?"""
