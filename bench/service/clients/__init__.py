"""What the handlers ask: the same questions, to the same servers, with three kinds of clients."""
