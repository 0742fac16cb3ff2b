"""What the policies are told, how bad input is refused, and the Core that is built of it, for both worlds."""
