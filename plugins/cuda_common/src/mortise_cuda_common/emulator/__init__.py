"""The functions of the vendor libraries on a CPU, under their own names and signatures."""
