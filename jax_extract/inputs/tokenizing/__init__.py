"""How texts become token ids as fast as the tokenizer itself: chunks, an encoder, processes beside this one, and shares
of several hosts. Start at `inputs.tokenize`.
"""
