"""The SDK: jobs as people write them, a client that submits and follows them, and its errors."""
