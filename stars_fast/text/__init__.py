"""Text in and out: chats, special tokens, ids and the text that they stand for. No torch."""
