namespace { int unused = 0; } namespace JAXSOFT_ISA { int f() { return unused; } }
