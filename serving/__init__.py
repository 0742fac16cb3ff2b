"""A server with OpenAI's interface over the engine, or over a simulated replica in real time."""
